"""Guests from boot on: loaders for their images and builders for their virtual machines."""
