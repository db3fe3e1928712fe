"""Decoding as pure functions: choosing tokens, accepting drafts, stopping, block lengths. No I/O, no threads.

Import the modules by name: stopping and block_policy need no torch, and a router process has none to spare for them.
"""
