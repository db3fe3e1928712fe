"""The tandem drafter: a small decoder whose keys and values of verified positions come from the primary's taps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem_serve.errors import ConfigError
from tandem_serve.models.decoder import Decoder, masked_attention
from tandem_serve.models.norm import RmsNorm


@dataclass(frozen=True)
class TandemConfig:
    """Which primary feeds a drafter, and how. layer_map[j] is the paper's l(j): the tap that MS layer j reads."""

    layer_map: tuple[int, ...]
    primary_hidden_size: int
    primary_num_layers: int
    primary_fingerprint: str

    @property
    def taps(self) -> tuple[int, ...]:
        """The primary layers that must be sent, ascending and without repetition."""
        return tuple(sorted(set(self.layer_map)))


def resolve_layer_map(spec: str, num_ms_layers: int, num_ml_layers: int) -> tuple[int, ...]:
    """`last` (every MS layer reads the primary's last), `uniform` (evenly spread) or one number a MS layer, "4,8".

    Raises:
        ConfigError: for anything else, or a layer that the primary does not have.
    """
    if spec == "last":
        return (num_ml_layers,) * num_ms_layers
    if spec == "uniform":
        return tuple(max(1, round((j + 1) * num_ml_layers / num_ms_layers)) for j in range(num_ms_layers))
    try:
        layers = tuple(int(part) for part in spec.split(","))
    except ValueError:
        raise ConfigError(f"layer map {spec!r}: expected last, uniform or numbers such as 4,8") from None
    if len(layers) != num_ms_layers or not all(0 <= layer <= num_ml_layers for layer in layers):
        raise ConfigError(f"layer map {spec!r}: expected {num_ms_layers} numbers from 0 to {num_ml_layers}")
    return layers


class TandemDrafter(nn.Module):
    """MS with one linear FF_Tandem per layer (paper Eq. 1-2).

    At a verified position the *input* of MS layer j is FF_Tandem_j(rms(x^{l(j)})), on which the layer's own input norm,
    W_K, W_V and RoPE act. The tap is RMS-normalised first, without parameters and in float32: raw hidden states of a
    primary grow to hundreds with depth. Positions of the block being drafted run through MS as in any decoder.
    """

    def __init__(self, decoder: Decoder, config: TandemConfig) -> None:
        super().__init__()
        c = decoder.config
        if len(config.layer_map) != c.num_layers:
            raise ConfigError(f"layer map {config.layer_map} for a drafter of {c.num_layers} layers")
        self.decoder = decoder
        self.config = config
        self.taps = config.taps
        self._tap_index = tuple(self.taps.index(layer) for layer in config.layer_map)
        self._normalise = RmsNorm(config.primary_hidden_size, c.rms_norm_eps)
        shape = (c.num_layers, config.primary_hidden_size, c.hidden_size)
        self.ff = nn.Parameter(torch.empty(shape, dtype=decoder.dtype, device=decoder.device))  # [L_S, d_L, d_S]

    @torch.no_grad()
    def init_projections(self, seed: int = 0) -> TandemDrafter:
        """Random FF_Tandem, as wide as the decoder's other weights: the layer's input norm undoes any scale."""
        generator = torch.Generator(device=self.ff.device).manual_seed(seed)
        self.ff.normal_(0.0, 0.02, generator=generator)
        return self

    def project(self, representations: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each MS layer caches for verified positions, from the primary alone (Eq. 2).

        Args:
            representations: [..., num_taps, d_L], raw, in the order of `taps`.
            positions: [...] int64.

        Returns:
            One (k [..., Hkv, D] rotated, v [..., Hkv, D]) per MS layer.
        """
        taps = self._normalise(representations).to(self.ff.dtype).unbind(-2)
        rotation = self.decoder.rotation(positions)
        return [
            self.decoder.keys_values(layer, taps[tap] @ self.ff[layer], rotation)
            for layer, tap in enumerate(self._tap_index)
        ]

    def forward_blocks(
        self,
        token_ids: Tensor,  # [B, T] int64
        representations: Tensor,  # [B, T, num_taps, d_L]
        block_index: Tensor,  # [B or 1, T] int64, non-decreasing along T
    ) -> Tensor:
        """The parallel training pass over whole sequences from position 0: hidden [B, T, d_S].

        Keys are 2T wide: T from the primary, T from MS itself. A query sees the primary's in strictly earlier blocks
        and MS's own in its block. (The paper prints floor(i/g)*g; its prose, and this, is floor((i-1)/g)*g, from 1.)
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        from_primary = self.project(representations, positions)
        masks = _block_masks(block_index, set(self.decoder.config.sliding_windows))
        windows = self.decoder.config.sliding_windows

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen_k, seen_v = from_primary[layer]
            keys, values = torch.cat((seen_k.to(k.dtype), k), 1), torch.cat((seen_v.to(v.dtype), v), 1)
            return masked_attention(q, keys, values, masks[windows[layer]])

        return self.decoder.run_layers(self.decoder.embed(token_ids), positions, attend).hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d_S] -> [..., V]."""
        return self.decoder.logits(hidden)

    def forward(self, token_ids: Tensor, representations: Tensor, block_index: Tensor) -> Tensor:
        """logits of `forward_blocks`, [B, T, V]."""
        return self.logits(self.forward_blocks(token_ids, representations, block_index))


def _block_masks(block_index: Tensor, windows: set[int | None]) -> dict[int | None, Tensor]:
    """One [B or 1, 1, T, 2T] mask per distinct sliding window, true where a query sees a key."""
    num_tokens = block_index.shape[1]
    position = torch.arange(num_tokens, device=block_index.device)
    age = position[:, None] - position
    query, key = block_index[:, :, None], block_index[:, None, :]
    earlier, own = key < query, (key == query) & (age >= 0)
    return {
        w: torch.cat((earlier, own) if w is None else (earlier & (age < w), own & (age < w)), -1)[:, None]
        for w in windows
    }
