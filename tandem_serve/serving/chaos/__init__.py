"""Breaking a cluster on purpose, under load, to show that no text changes: `tandem-serve chaos`."""
