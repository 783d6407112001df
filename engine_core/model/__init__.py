"""Model execution with PyTorch: configuration, weights, decoder, runner, sampler."""
