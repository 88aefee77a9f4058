"""Log-probability and entropy over a sharded vocabulary."""
