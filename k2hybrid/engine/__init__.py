"""The engine: sequences, what a step runs, the thread that owns model and pages. Layer 4; knows no chat."""
