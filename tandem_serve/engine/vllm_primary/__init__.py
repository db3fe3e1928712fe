"""vLLM as the primary: official extension points only, no patched source (docs/vllm.md).

`engine` drives vLLM in this process as TorchPrimary drives itself; `scheduler` holds requests back whose drafts are
under way; `worker` hands out the taps; `sampling` makes vLLM's choice of a token ours. `request_drafting` knows nothing
of vLLM: it is engine/drafting.py fed from a scheduler's steps. Importing this package imports no vLLM.
"""
