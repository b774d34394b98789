"""Paired timings, as `bittern bench` takes them."""

from bittern.deploy.timing import alternate, ratios

__all__ = ["alternate", "ratios"]
