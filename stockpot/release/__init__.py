"""From a soup to an alias: the gate, promotion, explanation, retention."""
