"""A server with OpenAI's interface, and a page for a browser.

page  the page: its files, and the routes that serve them
"""
