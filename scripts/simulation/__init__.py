"""A deterministic simulation of a front end, its engines and the network between them."""
