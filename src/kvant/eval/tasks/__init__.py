"""Benchmark tasks: accuracy of KV formats on data sets, with lm-eval as the harness."""
