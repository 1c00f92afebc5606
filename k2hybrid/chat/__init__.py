"""Text and tokens of conversations: tokenizer, chat template, and the machine that reads the model's output.

Pure functions of tokens; imports layer 0 only, and no torch.
"""
