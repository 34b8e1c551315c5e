"""What a KV format costs on a model and a text: ``kvant eval``."""
