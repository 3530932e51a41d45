"""Language models as policies, and with a scalar head as value and reward models."""
