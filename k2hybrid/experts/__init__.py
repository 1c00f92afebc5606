"""The routed INT4 experts: where they lie, how they are asked, and the reference they are checked against. Layer 2."""
