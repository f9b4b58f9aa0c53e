"""Downloads from and uploads to the Hugging Face Hub.

repositories  names to commits; find and download adapters and bases
client        one request to the Hub, with a deadline
worker        the process that makes the request
errors        the errors of requests, and whether another try can help
listing       the files of a commit
snapshot      files of one commit in a folder, whole or absent
adapter       an adapter's folder, its weights only if its config is sound
card          the metadata in a model card
about         author, licence and downloads of a repository
bundle        the files to publish
upload        publish a bundle, by way of a staging branch
"""
