"""The built-in model: its vocabulary, its data, its training and its export in the published layout."""
