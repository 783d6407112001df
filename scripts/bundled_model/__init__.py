"""Parts of `train_bundled_model.py`: the corpus and tokenizer, the network, the model card."""
