"""Columns of other names and shapes, mapped by declaration to those that the formats read; maps of public sets."""
