// The site's search puts first what is called as the reader typed: a method of LayerDiffusion, any name, a page.
;(() => {
  const search = window.Fuse.prototype.search
  window.Fuse.prototype.search = function (words, { limit } = {}) {
    const typed = words.trim(), small = typed.toLowerCase()
    const rank = ({ item: { title, section } }) => {
      const name = section || title, lower = name.toLowerCase()
      return [name === `LayerDiffusion.${typed}`, !section && name === typed, name === typed, !section && lower === small,
              lower === small, lower.endsWith(`.${small}`), !section && lower.startsWith(small), true].indexOf(true)
    }
    return search.call(this, words).sort((a, b) => rank(a) - rank(b)).slice(0, limit)
  }
})()
