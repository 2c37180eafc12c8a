"""Speed, measured side by side: one process a runtime, taking turns, so that a drifting machine hurts all alike."""
