"""The sparse block: routing, dispatch, experts, combination, and the account of every token."""
