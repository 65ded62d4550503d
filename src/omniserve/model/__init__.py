"""Checkpoints, the decoder in three calls, tokenizer and sampling. Nothing here knows requests or KV."""
