export const greeting = "one";
