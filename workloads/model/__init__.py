"""Models: transformer, mixture of experts, LoRA, Hugging Face's formats, and loading weights."""
