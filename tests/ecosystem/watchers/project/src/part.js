module.exports = "builds one";
