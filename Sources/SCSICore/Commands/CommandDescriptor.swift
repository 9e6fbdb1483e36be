struct CommandDescriptor {}
