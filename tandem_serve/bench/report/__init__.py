"""`tandem-serve report`: what evaluations, benchmarks and training runs wrote, as one HTML file beside the paper."""
