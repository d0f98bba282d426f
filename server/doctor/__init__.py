"""What `vashista doctor` looks at and `vashista attest` signs: findings about this machine, made at that moment."""
