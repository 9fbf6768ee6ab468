console.log(require("./part.js"));
