"""Training of primaries and drafters. Needs the `train` extra only where a Hugging Face dataset is named."""
