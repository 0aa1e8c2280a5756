"""The demo: everything that is special to it. Product code imports nothing from here."""
