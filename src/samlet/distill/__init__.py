"""Distillation: teachers, what is compared, and with what weight."""
