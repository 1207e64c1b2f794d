"""What a run tells of a model: how much its blocks' outputs change from pass to pass, and the policy that follows."""
