"""Throughput benchmark records: their sealed form, tables and page."""
