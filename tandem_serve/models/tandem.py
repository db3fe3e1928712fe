"""The tandem drafter: a small decoder whose keys and values of verified positions come from the primary's taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem_serve.errors import ConfigError
from tandem_serve.models.decoder import Decoder, masked_attention
from tandem_serve.models.norm import RmsNorm


@dataclass(frozen=True)
class TandemConfig:
    """Which primary feeds a drafter, and how.

    layer_map[j] is the paper's l(j), the tap that MS layer j reads; or several taps, side by side, equally many for
    each layer.
    """

    layer_map: tuple[tuple[int, ...], ...]
    primary_hidden_size: int
    primary_num_layers: int
    primary_fingerprint: str

    @property
    def taps(self) -> tuple[int, ...]:
        """The primary layers that must be sent, ascending and without repetition."""
        return tuple(sorted({tap for taps in self.layer_map for tap in taps}))


def resolve_layer_map(spec: str, num_ms_layers: int, num_ml_layers: int) -> tuple[tuple[int, ...], ...]:
    """The taps of each MS layer.

    `last` (every MS layer reads the primary's last), `uniform` (evenly spread), or for each MS layer its taps: "4,8",
    or "2+4,2+8" where it reads several. One such entry alone holds for every layer: "2+8".

    Raises:
        ConfigError: for anything else, or a layer that the primary does not have.
    """
    if spec == "last":
        return ((num_ml_layers,),) * num_ms_layers
    if spec == "uniform":
        return tuple((max(1, round((j + 1) * num_ml_layers / num_ms_layers)),) for j in range(num_ms_layers))
    try:
        layer_map = tuple(tuple(int(tap) for tap in entry.split("+")) for entry in spec.split(","))
    except ValueError:
        raise ConfigError(f"layer map {spec!r}: expected last, uniform, or taps such as 4,8 or 2+8") from None
    if len(layer_map) == 1:
        layer_map *= num_ms_layers
    if len(layer_map) != num_ms_layers:
        raise ConfigError(f"layer map {spec!r}: expected one entry for each of {num_ms_layers} drafter layers")
    check_layer_map(layer_map, num_ml_layers)
    return layer_map


def check_layer_map(layer_map: tuple[tuple[int, ...], ...], num_ml_layers: int) -> None:
    """Raises ConfigError where a layer map names layers that the primary has not, or is ragged."""
    if not all(0 <= tap <= num_ml_layers for taps in layer_map for tap in taps):
        raise ConfigError(f"layer map {layer_map} names layers the primary has not: it has 0 to {num_ml_layers}")
    if len({len(taps) for taps in layer_map}) != 1 or not layer_map[0]:
        raise ConfigError(f"layer map {layer_map}: every drafter layer reads equally many taps, one or more")


class TandemDrafter(nn.Module):
    """MS with one linear FF_Tandem per layer (paper Eq. 1-2).

    At a verified position the *input* of MS layer j is FF_Tandem_j(rms(x^{l(j)})), on which the layer's own input norm,
    W_K, W_V and RoPE act. The tap is RMS-normalised first, without parameters and in float32: raw hidden states of a
    primary grow to hundreds with depth. Where l(j) is several taps, FF_Tandem reads their concatenation (as EAGLE-3
    fuses low, middle and high features). Positions of the block being drafted run through MS as in any decoder.
    """

    def __init__(self, decoder: Decoder, config: TandemConfig) -> None:
        super().__init__()
        c = decoder.config
        if len(config.layer_map) != c.num_layers:
            raise ConfigError(f"layer map {config.layer_map} for a drafter of {c.num_layers} layers")
        self.decoder = decoder
        self.config = config
        self.taps = config.taps
        self._tap_index = tuple(tuple(self.taps.index(tap) for tap in taps) for taps in config.layer_map)
        self._normalise = RmsNorm(config.primary_hidden_size, c.rms_norm_eps)
        shape = (c.num_layers, len(config.layer_map[0]) * config.primary_hidden_size, c.hidden_size)
        self.ff = nn.Parameter(torch.empty(shape, dtype=decoder.dtype, device=decoder.device))  # [L_S, K * d_L, d_S]

    @torch.no_grad()
    def init_projections(self, seed: int = 0) -> TandemDrafter:
        """Random FF_Tandem, as wide as the decoder's other weights: the layer's input norm undoes any scale."""
        generator = torch.Generator(device=self.ff.device).manual_seed(seed)
        self.ff.normal_(0.0, 0.02, generator=generator)
        return self

    def pack(self) -> TandemDrafter:
        """Decoder.pack of MS's own layers."""
        self.decoder.pack()
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
            self.decoder.keys_values(layer, _side_by_side(taps, index) @ self.ff[layer], rotation)
            for layer, index in enumerate(self._tap_index)
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


def _side_by_side(taps: Sequence[Tensor], index: tuple[int, ...]) -> Tensor:
    """The taps [..., d_L] at `index` as one [..., K * d_L]."""
    return taps[index[0]] if len(index) == 1 else torch.cat([taps[i] for i in index], -1)


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
