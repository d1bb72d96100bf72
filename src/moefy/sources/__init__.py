"""What is read: dense models, their tokenizers, text; directories, GGUF files and the hub."""
