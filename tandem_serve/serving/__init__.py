"""What clients and clusters see: the text service, OpenAI's HTTP API, pairing of replicas, and Ray Serve."""
