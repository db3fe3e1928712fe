"""Benchmarks that a user runs: every claim is a ratio within one run, printed as a table and written as JSON."""
