"""The routed INT4 experts: where they lie, how they are asked, and their reference. Layer 2."""
