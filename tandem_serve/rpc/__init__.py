"""gRPC: the drafting stream between the pools, the primary's token-level service, and the public text-level service.

Import the modules by name: only the drafting ones need torch, and a router process has none to spare.
"""
