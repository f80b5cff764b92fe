"""Selection of what queries attend to."""
