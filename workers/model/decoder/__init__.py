"""The ERNIE 4.5 decoder in PyTorch, and what runners on every device share."""
