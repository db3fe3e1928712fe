"""The engines of the two pools, without Ray and without gRPC. They meet at tandem_serve.interfaces.

A primary's step, file by file: torch_primary (the loop) - scheduler (what runs) - forward (one ragged pass) -
choosing (which tokens; canonical: near ties) - drafting (what drafters are told, and what they answered).
"""
