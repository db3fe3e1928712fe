"""The models: one lean decoder for the Llama family, the tandem drafter on top of it, and their checkpoints."""
