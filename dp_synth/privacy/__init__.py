"""The privacy mechanism: what is promised, how it is accounted, where its randomness comes from."""
