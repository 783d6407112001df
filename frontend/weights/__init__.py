"""Weight updates of all engines: staged beside the weights that serve, then committed together."""
