"""What is learned from: datasets, captions, tokenizers and the stream of batches. numpy only; never imports jax."""
