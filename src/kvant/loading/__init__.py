"""Models from disk, packages or the hub: weights, configs, tokenizers, chat templates."""
