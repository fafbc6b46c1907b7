"""Hydra configurations, in solo-learn's schema: pkg://iecl_solo.configs."""
