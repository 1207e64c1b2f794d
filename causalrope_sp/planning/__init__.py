"""What a stream costs, predicted from sizes alone."""
