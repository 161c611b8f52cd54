"""How tokens reach their experts and come back: one module a method."""
