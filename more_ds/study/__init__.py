"""The paper's experiments as data: what is run, in a queue that can be interrupted anywhere, and what comes out."""
